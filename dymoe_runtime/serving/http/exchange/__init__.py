"""What goes over the wire, whatever is asked: errors in the forms of the protocols, JSON, and streams."""
