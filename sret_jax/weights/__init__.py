"""Any path to variables and back."""
