"""Plan → read → compute → write, streamed: the way of the data through ``know-predict``."""
