"""The control socket: QMP (wire.qmp) over what streams and what serves."""
