"""nbdstream and its peers, measured side by side in one run: ``scripts/bench``.

``peers`` knows the command lines of everybody who is compared, ``reads`` and ``transfer`` measure them in turns (the
first of a round is another one each time), ``results`` holds what was measured and ``report`` writes it down.
"""
