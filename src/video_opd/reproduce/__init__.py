"""The paper's tables and figures on the generated world: experiments, their results, and what these say."""
