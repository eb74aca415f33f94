"""The hand-over protocol without I/O: its messages, its journal records, and what each side does about what happens.

docs/handover.md is its description. :mod:`~nbdstream.wire.handover.messages` is what goes over the wire,
:mod:`~nbdstream.wire.handover.source` and :mod:`~nbdstream.wire.handover.destination` decide,
:mod:`~nbdstream.wire.handover.vocabulary` is what they take and give.
"""
