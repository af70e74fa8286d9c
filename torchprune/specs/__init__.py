"""What a user asks for, as frozen values, and what a method is asked; imports the errors alone."""
