"""General video understanding (figure 4): TempCompass, MVBench and Video-MME, through lmms-eval.

lmms-eval brings the wording of the questions and the scoring. The videos, the responses and their files are
ours, as in the rest of the project. ``suite.run`` does everything; the other modules are its steps:

``benchmarks``    the benchmarks, their subtasks, and the schemas of their rows
``rows``          the rows and their videos, from a folder or from the hub's copies on this machine
``requirements``  what a run needs, what of it is missing here, and the command that gets it
``task_files``    lmms-eval's own task files, pointed at our rows and hooks
``lmms_model``    our model as lmms-eval calls it; ``entry`` is how lmms-eval finds it
``responder``     a model folder that answers questions, and the file that keeps its responses
``hooks``         the functions that lmms-eval calls for each row: read the letter, let lmms-eval score it
``letters``       which option a response means
``accuracy``      accuracies with intervals, from the scored rows
``terminal``      the results and the survey, printed
"""
