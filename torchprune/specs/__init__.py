"""What a user asks for, as frozen values without tensors; imports the errors alone."""
