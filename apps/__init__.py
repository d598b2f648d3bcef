"""What people use beside the API: knows the server by its OpenAI API alone."""
