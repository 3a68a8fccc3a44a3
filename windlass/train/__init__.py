"""The training loop and everything it needs: model, data, loss, metrics, evaluation, report."""
