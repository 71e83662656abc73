"""A fusion strategy of your own, trained with Stable-Baselines3.

    python examples/custom_fusion.py
    python examples/custom_fusion.py --steps 512
"""
