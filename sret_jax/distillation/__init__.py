"""A teacher's labels, live or stored, and how stores of labels are made."""
