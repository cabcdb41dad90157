"""What people see: text, JSON, arguments, pictures."""
