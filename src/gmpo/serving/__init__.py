"""An OpenAI-compatible gateway over the embedded engine and over upstream servers."""
