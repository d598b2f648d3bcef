"""Fine-tuning: LoRA on frozen weights of any format, by the model and the plan that serve them."""
