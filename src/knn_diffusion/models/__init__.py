"""The networks: tokenizer, denoiser, joint encoders and the evaluation's judge."""
