"""What a response is judged by: reward models, their losses and calibration, rule judges, and how they combine."""
