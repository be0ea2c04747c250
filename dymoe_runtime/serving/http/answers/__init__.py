"""From a request of any protocol to the pieces of its answers."""
