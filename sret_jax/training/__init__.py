"""From a config to a trained model: state, optimizer, step, loop and evaluation."""
