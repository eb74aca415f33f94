"""Sans-I/O protocol cores: bytes in, events and bytes out. No asyncio, socket or file in here."""
