"""What is done with lists of gradients."""

import numpy as np
import tensorflow as tf

from trainstep.gradients import all_finite


def test_all_finite_looks_everywhere():
    sparse = tf.IndexedSlices(tf.constant([[np.inf]]), tf.constant([0]), tf.constant([3, 1]))
    assert bool(all_finite([tf.ones(3), None, tf.zeros(())]))
    assert not bool(all_finite([tf.ones(3), tf.constant([1.0, np.nan])]))
    assert not bool(all_finite([tf.ones(3), sparse]))
