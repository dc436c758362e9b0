"""stub"""
class LogSink:
    def __init__(self, settings): pass
    def __call__(self, finding): print(finding.summary)
