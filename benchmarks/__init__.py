"""What the README claims, measured: each command is `python -m benchmarks.NAME`; results/ holds the receipts."""
