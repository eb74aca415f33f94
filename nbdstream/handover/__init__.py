"""The hand-over of live disks: what drives the state machines of :mod:`nbdstream.wire.handover`, on real hosts."""
