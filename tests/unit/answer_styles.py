"""Answers in the styles that models write, and what the rules of the ``paper`` protocol make of them.

Each row is ``(text, rule, span)``, worked out by hand from the five rules: the first that matches counts,
within a rule the last place. What is reversed or empty keeps its rule and has no span.
"""

from __future__ import annotations

from typing import TypeAlias

Row: TypeAlias = tuple[str, str, tuple[float, float] | None]

A = (12.54, 17.83)
WHOLE = (12.0, 17.0)

EXACT: list[Row] = [
    ("12.54 to 17.83", "exact", A),
    ("  12.54 to 17.83\n", "exact", A),
    ("\t12.54   to   17.83  ", "exact", A),
    ("12.54\nto\n17.83", "exact", A),
    ("12.54 TO 17.83", "exact", A),
    ("12.54 To 17.83", "exact", A),
    ("12.54\u00a0to\u00a017.83", "exact", A),  # no-break spaces
    ("0 to 5", "exact", (0.0, 5.0)),
    ("0.00 to 0.01", "exact", (0.0, 0.01)),
    ("012.54 to 017.83", "exact", A),
    ("12.5 to 17.825", "exact", (12.5, 17.825)),
    ("3599.99 to 3661.00", "exact", (3599.99, 3661.0)),
    # a span that is none
    ("17.83 to 12.54", "exact", None),
    ("12.54 to 12.54", "exact", None),
    ("0.00 to 0.00", "exact", None),
]

UNITS: list[Row] = [
    ("12.54s to 17.83s", "to", A),
    ("12.54 s to 17.83 s", "to", A),
    ("12.54s to 17.83 seconds", "to", A),
    ("12.54 seconds to 17.83 seconds.", "to", A),
    ("12.54 second to 17.83 second", "to", A),
    ("12.54 second(s) to 17.83 second(s)", "to", A),
    ("12.54 sec to 17.83 sec", "to", A),
    ("12.54 secs to 17.83 secs", "to", A),
    ("12.54 sec. to 17.83 sec.", "to", A),
    ("12.54 s. to 17.83 s.", "to", A),
    ("12.54Sec to 17.83Sec", "to", A),
    ("12.54 SECONDS TO 17.83 SECONDS", "to", A),
    ("12.54 (s) to 17.83 (s)", "to", A),
    ("12.54 (seconds) to 17.83 (seconds)", "to", A),
    ("12.54 to 17.83 (in seconds)", "to", A),
    ("Seconds 12.54 to 17.83", "to", A),
    ("the 12-second to 17-second mark", "to", WHOLE),
    ("12.54s-17.83s", "dash", A),
    ("12.54秒 - 17.83秒", "dash", A),
    ("12.54秒—17.83秒", "dash", A),
    ("from the 12-second mark to the 17-second mark", "from_and", WHOLE),
    # units that are not seconds
    ("1 to 2 minutes", "none", None),
    ("0.2 min to 0.3 min", "none", None),
    ("0 min 12 s to 0 min 17 s", "none", None),
    ("00m12s to 00m17s", "none", None),
    ("12540 ms to 17830 ms", "none", None),
    ("1h to 2h", "none", None),
    ("12.54 s to 0.3 min", "none", None),
    ("10% to 20% of the video", "none", None),
    ("frames 12 to 17 frames", "none", None),
    ("10:30 am to 11:00 am", "none", None),
    ("12.54 to 17.83 s, that is 0.2 to 0.3 minutes", "to", A),
]

WRAPPED: list[Row] = [
    ("12.54 to 17.83.", "to", A),
    ("**12.54 to 17.83**", "to", A),
    ("**12.54** to **17.83**", "to", A),
    ("*12.54* to *17.83*", "to", A),
    ("_12.54_ to _17.83_", "to", A),
    ("__12.54__ to __17.83__", "to", A),
    ("`12.54` to `17.83`", "to", A),
    ("```\n12.54 to 17.83\n```", "to", A),
    ("“12.54 to 17.83”", "to", A),
    ("'12.54' to '17.83'", "to", A),
    ("‘12.54’ to ‘17.83’", "to", A),
    ('12.54" to 17.83"', "to", A),
    ("(12.54 to 17.83)", "to", A),
    ("[12.54] to [17.83]", "to", A),
    ("<12.54> to <17.83>", "to", A),
    ("<answer>12.54 to 17.83</answer>", "to", A),
    ("<answer> 12.54s to 17.83s </answer>", "to", A),
    ("\\boxed{12.54 to 17.83}", "to", A),
    ("$12.54$ to $17.83$", "to", A),
    ("12.54to17.83", "to", A),
    ("12.54s to17.83s", "to", A),
    ("12.54s\nto\n17.83", "to", A),
    ("~12.54 to ~17.83", "to", A),
    ("*12.54* - *17.83*", "dash", A),
    ("`12.54 - 17.83`", "dash", A),
    ("**12.54s** – **17.83s**", "dash", A),
    ("~12.54s - ~17.83s", "dash", A),
]

PREFIXED: list[Row] = [
    ("Answer: 12.54 to 17.83", "to", A),
    ("Answer:12.54 to 17.83", "to", A),
    ("Final answer: **12.54 to 17.83**", "to", A),
    ("start time to end time: 12.54 to 17.83", "to", A),
    ("- 12.54 to 17.83", "to", A),
    ("• 12.54 to 17.83 s", "to", A),
    ("1. 12.54 to 17.83", "to", A),
    ("1) 12.54 to 17.83", "to", A),
    ("Event 1: 12.54 to 17.83", "to", A),
    ("Scene 1 - 12.54 to 17.83", "to", A),
    ("The event happens from 12.54 to 17.83 seconds.", "to", A),
    ("The event takes place from second 12.54 to 17.83.", "to", A),
    ("The event occurs from approximately 12.54 seconds to 17.83 seconds.", "to", A),
    ("It lasts 12.54 s to about 17.83 s.", "to", A),
    ("Sure! Here is the time span you asked for:\n\n12.54 to 17.83", "to", A),
    ("12.54 to 17.83\n\nThe man opens the door and walks in.", "to", A),
    ("12.54 to 17.83 (duration: 5.29 s)", "to", A),
    ("Duration 5.29 s (12.54 to 17.83)", "to", A),
    ("12.54 to 17.83 out of 35.2 seconds", "to", A),
    ("12.54 to 17.83 with 90% confidence", "to", A),
    ("In the 2-minute video it is 12.54 to 17.83.", "to", A),
    ("between 12.54 to 17.83", "to", A),
    ("0.5 to .9 s", "to", (0.5, 0.9)),
    ("12.0 to 17.", "to", WHOLE),  # cut off, or the end of a sentence: a number that is there
    ("Time: 12.54 - 17.83", "dash", A),
    ("The given query happens in 12.54 - 17.83 seconds.", "dash", A),
    ("The event happens in 12.54 - 17.83 seconds.", "dash", A),
    ("Start time to end time: 12.54 - 17.83", "dash", A),
    ("from 12.54 - 17.83", "dash", A),
    ("[12.54s - 17.83s] the cup falls", "dash", A),
]

ECHOED: list[Row] = [
    ('The event "the 3 men cross 2 lines" happens from 12.54 to 17.83.', "to", A),
    ('The event "3 to 4 people enter" occurs at 12.54 to 17.83 seconds.', "to", A),
    ("“He counts from 1 to 10”: 12.54 to 17.83", "to", A),
    ('"player 7 - player 10": 12.54 to 17.83', "to", A),
    ('The event "person 1 - person 2 handshake" is at 12.54 - 17.83.', "dash", A),
    ("In 3 scenes, the event is at 12.54 to 17.83", "to", A),
    ("Query 2, 5 people: between 12.54 and 17.83", "from_and", A),
    ("between 3 and 5 people appear from 12.54 to 17.83", "to", A),
    # The order of the rules decides, also where an echo has the stronger shape.
    ("“He counts from 1 to 10”: between 12.54 and 17.83", "to", (1.0, 10.0)),
    # An echo alone is no answer.
    ("The 3 men cross 2 lines.", "none", None),
    ("between 2 and 3 people", "none", None),
    ("from 2 men sitting to 5 women standing", "none", None),
    ("The video starts with 2 men and ends with 5 women.", "none", None),
]

SEVERAL: list[Row] = [
    ("1 to 2, no: 12.54 to 17.83", "to", A),
    ("1.0 to 12.54 to 17.83", "to", A),
    ("1.00 to 2.00\n12.54 to 17.83", "to", A),
    ("1.00 to 2.00, 12.54 to 17.83", "to", A),
    ("1.00 to 2.00 and 12.54 to 17.83", "to", A),
    ("12.54 to 17.83 or 20.10 to 25.30", "to", (20.1, 25.3)),
    ("1.00 to 2.00,12.54 to 17.83", "to", A),
    ("1-2, then 12.54-17.83", "dash", A),
    ("1.0 - 2.0; 12.54 - 17.83", "dash", A),
    ("1.00-2.00,12.54-17.83", "dash", A),
    ("1.0 - 2.0 (12.54 to 17.83)", "to", A),
    ("12.54 to 17.83 (00:12 - 00:17)", "to", A),
    ("00:12 - 00:17 (12.54 - 17.83 s)", "dash", A),
    ('[{"start": 1.0, "end": 2.0}, {"start": 12.54, "end": 17.83}]', "from_and", A),
    # the last one is reversed: a match without a span, and earlier ones are not tried
    ("12.54 to 17.83, 9.00 to 3.00", "to", None),
]

DASHES: list[Row] = [
    ("12.54 - 17.83", "dash", A),
    ("12.54-17.83", "dash", A),
    ("12.54 -17.83", "dash", A),
    ("12.54- 17.83", "dash", A),
    ("12.54–17.83 s", "dash", A),  # en
    ("12.54 — 17.83", "dash", A),  # em
    ("12.54‐17.83", "dash", A),  # hyphen
    ("12.54‑17.83", "dash", A),  # no-break hyphen
    ("12.54‒17.83", "dash", A),  # figure
    ("12.54―17.83", "dash", A),  # horizontal bar
    ("12.54−17.83", "dash", A),  # minus
    ("12.54－17.83", "dash", A),  # full width
    ("12.54﹣17.83", "dash", A),  # small
    ("12.54~17.83", "dash", A),
    ("12.54 ~ 17.83", "dash", A),
    ("12.54～17.83", "dash", A),  # full-width tilde
    ("12.54 〜 17.83", "dash", A),  # wave
    ("12.54--17.83", "dash", A),
    ("12.54 --- 17.83", "dash", A),
    ("12.54\u2009s\u2009–\u200917.83\u2009s", "dash", A),  # thin spaces
    ("[12.54 - 17.83]", "dash", A),
    ("17 - 12", "dash", None),
    ("12.54 - 12.54", "dash", None),
    ("filmed on 2026-11-22", "none", None),
    ("12-17-20", "none", None),
    ("2026-11-22 to 2026-11-23", "none", None),
]

CLOCKS: list[Row] = [
    ("00:12 to 00:17", "clock", WHOLE),
    ("00:12 - 00:17", "clock", WHOLE),
    ("0:12 - 0:17", "clock", WHOLE),
    ("00:12–00:17", "clock", WHOLE),
    ("0:12 to 0:17.", "clock", WHOLE),
    ("[00:12 - 00:17] the cup falls", "clock", WHOLE),
    ("**00:12** to **00:17**", "clock", WHOLE),
    ("00:12.54 to 00:17.83", "clock", A),
    ("[00:12.54 – 00:17.83]", "clock", A),
    ("00:00:12 - 00:00:17", "clock", WHOLE),
    ("00:00:12.54 to 00:00:17.83", "clock", A),
    ("1:05 to 1:10", "clock", (65.0, 70.0)),
    ("from 1:02:03 to 1:02:10", "clock", (3723.0, 3730.0)),
    ("75:10 to 76:00", "clock", (4510.0, 4560.0)),
    ("12:54 to 17:30", "clock", (774.0, 1050.0)),
    ("between 00:12 and 00:17", "clock", WHOLE),
    ("from about 02:05 when she sits down to around 02:15", "clock", (125.0, 135.0)),
    ("Start: 00:12, End: 00:17", "clock", WHOLE),
    ("It starts at 0:12 and ends at 0:17.", "clock", WHOLE),
    ('{"start": "00:12", "end": "00:17"}', "clock", WHOLE),
    ('```json\n[{"start_time": "00:12.54", "end_time": "00:17.83"}]\n```', "clock", A),
    ('["00:12", "00:17"]', "clock", WHOLE),
    ("[00:12, 00:17]", "clock", WHOLE),
    ("(00:12,00:17)", "clock", WHOLE),
    ("00:01 - 00:02, 00:12 - 00:17", "clock", WHOLE),
    ("00:12 - 00:17 (5 seconds)", "clock", WHOLE),
    ("00:17 - 00:12", "clock", None),
    ("00:12 to 00:12", "clock", None),
    ("At 00:12 he enters, at 00:17 he leaves.", "none", None),
    ("at 00:12", "none", None),
    ("00:75 to 00:80", "none", None),
    ("12:54 to 17:83", "none", None),
    ("1:2 to 1:5", "none", None),
    ("0:12 to 17", "none", None),
    ("12.54s to 0:17", "none", None),
    ("the ratio went 16:9 to 4:3", "none", None),
    ("00:00:12,540 to 00:00:17,830", "none", None),
]

FROM_AND: list[Row] = [
    ("between 12.54 and 17.83", "from_and", A),
    ("between 12.54 and 17.83 seconds", "from_and", A),
    ("Between about 12.54s and 17.83s, the cup falls.", "from_and", A),
    ("between second 12.54 and second 17.83", "from_and", A),
    ("between **12.54** and **17.83**", "from_and", A),
    ("between 12 and 17", "from_and", WHOLE),
    ("between 12 and 17 s", "from_and", WHOLE),
    ("The event happens between 12.54 seconds and 17.83 seconds.", "from_and", A),
    ("from 12.54 s, when the door opens, to the 17.83 second mark", "from_and", A),
    ("from 12.54 seconds, when he enters, to 17.83 seconds", "from_and", A),
    ("from 12.54, to 17.83", "from_and", A),
    ("from t=12.54 to t=17.83", "from_and", A),
    ("from 12 up to around 17", "from_and", WHOLE),
    ("It starts at 12.54 and ends at 17.83.", "from_and", A),
    ("It begins at 12.54 seconds. It ends at 17.83 seconds.", "from_and", A),
    ("Starting time: 12.54 seconds. Ending time: 17.83 seconds.", "from_and", A),
    ("The start time is 12.54 and the end time is 17.83.", "from_and", A),
    ("Start: 12\nEnd: 17", "from_and", WHOLE),
    ("**Start:** 12.54s **End:** 17.83s", "from_and", A),
    ("- Start: 12.54\n- End: 17.83", "from_and", A),
    ("Start - 12.54, End - 17.83", "from_and", A),
    ("start 12.54 end 17.83", "from_and", A),
    ("begins at 12.54 s and stops at 17.83 s", "from_and", A),
    ("start: 12.54 (he stands up), end: 17.83 (he sits down)", "from_and", A),
    ("<start>12.54</start> <end>17.83</end>", "from_and", A),
    ("start_time=12.54, end_time=17.83", "from_and", A),
    ("startTime: 12.54, endTime: 17.83", "from_and", A),
    ('{"start": 12.54, "end": 17.83}', "from_and", A),
    ('{"start": "12.54s", "end": "17.83s"}', "from_and", A),
    ("{'start_time': 12.54, 'end_time': 17.83}", "from_and", A),
    ('```json\n{"event": "a door opens", "start": 12.54, "end": 17.83}\n```', "from_and", A),
    ('{"start": {"time": 12.54}, "end": {"time": 17.83}}', "from_and", A),
    ("between 17 and 12 seconds", "from_and", None),
    ("starts at 17.83 and ends at 12.54", "from_and", None),
    ('{"start": 12.54, "end": 12.54}', "from_and", None),
    # the wrong way round, or half of it
    ("end: 17.83, start: 12.54", "none", None),
    ("It starts at 12.54 seconds and lasts 5.29 seconds.", "none", None),
    ("It starts at 12.54 seconds and goes on until 17.83 seconds.", "none", None),
    ("s=12.54, e=17.83", "none", None),
]

NOTHING: list[Row] = [
    ("", "none", None),
    ("   \n", "none", None),
    ("N/A", "none", None),
    ("The event does not happen.", "none", None),
    # one number
    ("12.54", "none", None),
    ("12.54 to", "none", None),
    ("12.54 to the end", "none", None),
    ("from the beginning to 17.83", "none", None),
    ("It starts at 12.54 seconds.", "none", None),
    # two that nothing ties together
    ("12.54 and 17.83", "none", None),
    ("12.54, 17.83", "none", None),
    ("12.54,17.83", "none", None),
    ("12.54 17.83", "none", None),
    ("12.54\n17.83", "none", None),
    ("12.54; 17.83", "none", None),
    ("12.54 / 17.83", "none", None),
    ("12.54/17.83", "none", None),
    ("12.54:17.83", "none", None),
    ("12.54 ... 17.83", "none", None),
    ("12.54..17.83", "none", None),
    ("12.54 until 17.83", "none", None),
    ("12.54 → 17.83", "none", None),
    ("[12.54, 17.83]", "none", None),
    ("(12.54, 17.83)", "none", None),
    ("[[12.54, 17.83], [20.1, 25.3]]", "none", None),
    ('{"timestamps": [12.54, 17.83]}', "none", None),
    ("<answer>12.54, 17.83</answer>", "none", None),
    ("At 12.54 s the man enters. At 17.83 s he leaves.", "none", None),
    ("12.54秒到17.83秒", "none", None),
    # numbers that are no times
    ("-5 to 10", "none", None),
    ("from -12.54 to -17.83", "none", None),
    ("12,54 to 17,83", "none", None),  # a decimal comma, or a list
    ("1,234 to 1,240", "none", None),
    ("1,234.5 to 1,240.5", "none", None),
    ("1.234,50 to 1.240,50", "none", None),
    ("1.2.3 to 4.5.6", "none", None),
    ("1e3 to 2e3", "none", None),
    ("1st to 3rd", "none", None),
    ("between the 12th and 17th second", "none", None),
    ("T12 to T17", "none", None),
    ("frame_12 to frame_17", "none", None),
    ("#3 to #5", "none", None),
    ("12x to 17x", "none", None),
    ("waited.12.54 then to 17.83", "none", None),
    ("9" * 400 + " to " + "9" * 401, "none", None),
]

STYLES = [*EXACT, *UNITS, *WRAPPED, *PREFIXED, *ECHOED, *SEVERAL, *DASHES, *CLOCKS, *FROM_AND, *NOTHING]

THINKING: list[Row] = [
    ("<think>1.00 to 2.00</think>12.54 to 17.83", "exact", A),
    ("<think>\nFrom 1 to 2 he walks.\n</think>\n\n12.54 to 17.83\n", "exact", A),
    ("it runs 1.00 to 2.00</think>\n\n12.54 to 17.83", "exact", A),
    ("<think>between 3 and 5</think><answer>12.54 to 17.83</answer>", "to", A),
    ("<think>00:01 - 00:02</think>The event happens in 12.54 - 17.83 seconds.", "dash", A),
    ("a</think>1 to 2</think> 12.54 s to 17.83 s", "to", A),
    ("<think>1 to 2</think>between 12.54 and 17.83", "from_and", A),
    ("<think>1 to 2</think>00:12 to 00:17", "clock", WHOLE),
    ("<think>1 to 2</think>I cannot tell.", "none", None),
    ("<think>1 to 2</think>17.83 to 12.54", "exact", None),
    ("<think>12.54 to 17.83", "none", None),  # the length limit came before the answer
    ("12.54 to 17.83</think>", "none", None),
    ("12.54 to 17.83", "none", None),
]
