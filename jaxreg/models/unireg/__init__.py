"""UniReg: the paper's network and the released pyramid."""
