"""Methods of prediction, all with one signature: windows in, predicted values out."""
