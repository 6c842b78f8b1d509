CLASSES = 6


def write(record): ...
