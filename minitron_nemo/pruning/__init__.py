"""From a trained model to a smaller one: calibration, the Plan for a target shape, and the student it makes."""
