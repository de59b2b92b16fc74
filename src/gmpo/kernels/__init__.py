"""Element-wise work of the model's layers as C functions, where a C compiler is installed."""
