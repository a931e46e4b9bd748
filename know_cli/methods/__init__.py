"""Predictors behind one signature: windows in, predicted values out."""
