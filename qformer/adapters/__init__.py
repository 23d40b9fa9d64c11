"""Small trained updates of frozen models: `lora` attaches low-rank updates to a language model."""
