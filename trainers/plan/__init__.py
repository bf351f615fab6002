"""What a run will hold and send, told before it runs: bytes of memory of each process, bytes on the wire of a step."""
