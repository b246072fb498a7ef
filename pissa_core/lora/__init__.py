"""Trained and initial PiSSA adapter → plain LoRA for the original model (`pissa-to-lora`).

W = R + s·B₀A₀ was split; training left R + s·BA. So on the original base the update is
ΔW = s·(BA − B₀A₀), of rank 2r at most: exactly [B, −B₀]·[A; A₀], or the best of a smaller rank.
"""
