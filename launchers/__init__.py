if __name__ != "mswift.launchers":
    raise ImportError("import this package as mswift.launchers, never as launchers (the folder is reached by a link)")
