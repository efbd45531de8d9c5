"""General video understanding (figure 4): TempCompass, MVBench and Video-MME, asked and scored by lmms-eval.

lmms-eval brings the questions' wording and the scoring; the videos, the answers and their files are ours, the
same as everywhere else in the project. ``suite.run`` does it all; the other modules are its steps:

``benchmarks``  what is asked, and the rows' schemas
``rows``        the rows and their videos, from a folder or from the hub's copies on this machine
``check``       what is missing here, and the command that gets it
``taskfiles``   lmms-eval's stock tasks, pointed at our rows and hooks
``model``       our model as lmms-eval sees it
``hooks``       what lmms-eval calls for each row: letters read, then its own scoring
``letters``     which option a text means
``scores``      accuracies with intervals, from the scored rows
``tables``      the same for people
"""
