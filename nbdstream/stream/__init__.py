"""The stream: source, fetches in flight, hydrator, throttle, and the job that runs them."""
