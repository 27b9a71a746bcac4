"""An endpoint in the manner of OpenAI's for a model, and a page to fill in answers by hand."""
