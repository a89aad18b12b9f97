"""What can be done with a checkpoint, and by which options: from what it is and what people say that they want."""
