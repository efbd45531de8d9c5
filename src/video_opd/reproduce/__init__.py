"""The paper's tables on the generated world: experiments, their results, and what these say."""
