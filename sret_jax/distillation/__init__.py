"""A teacher's labels: live or stored, and their making."""
