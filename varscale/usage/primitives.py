"""Names of primitives by what the walk over a jaxpr does with them."""

SAME = {"convert_element_type", "stop_gradient", "copy", "copy_p", "name", "optimization_barrier", "reduce_precision", "pvary"}
SAME |= {"sharding_constraint", "mesh_cast", "rev", "neg"}
REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin", "reduce"}
WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window", "reduce_window_min", "cumsum", "cumlogsumexp", "cummax"}
ACTIVATIONS = {"tanh", "logistic", "erf", "erfc", "exp", "exp2", "log", "log1p", "expm1", "sin", "cos", "abs", "square"}
ACTIVATIONS |= {"sign", "integer_pow", "sqrt", "rsqrt", "cbrt", "floor", "round", "asinh", "atan", "sinh", "cosh", "is_finite"}
ACTIVATIONS |= {"not"}
BINARY = {"add", "add_any", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem", "select_n", "clamp", "complex"}
BINARY |= {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"}
MASKS = {"select_n", "max", "eq"}
LINEAR = {"fft", "real", "imag", "conj"}  # of those that the walk does not know otherwise
HOMOGENEOUS = {"relu", "leaky_relu", "abs"}  # f(cx) = c·f(x) for c > 0
