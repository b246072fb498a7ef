"""The service's workers and the job store; the API uses its torch-free half."""
