"""LoRA adapters learnt, extracted, composed, merged, rendered and scored."""
