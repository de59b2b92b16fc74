"""What a model's layers do on a CPU as C functions, where a C compiler is installed."""
