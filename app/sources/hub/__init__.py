"""Models and adapters of the Hugging Face hub, or of whatever answers as it does: `hf:ORG/NAME@REVISION`."""
