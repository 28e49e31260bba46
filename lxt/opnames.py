"""The names of torch's operations, by kind: what is linear, what is a product, what is a gate.

Names and not function objects: `x * y`, torch.mul, Tensor.mul_ and aten.mul are one operation here. The table with
the reasons is in docs/how-it-works.md.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = [
    "BOUNDS",
    "BY_RATIO",
    "CLOSED_FORMS",
    "CONSTANT",
    "DIVISIONS",
    "DROPOUTS",
    "IN_PLACE_DUNDERS",
    "KNOWN",
    "LINEAR",
    "LINEAR_LAYERS",
    "MARK_KEEPING",
    "MATRIX_PRODUCTS",
    "NORM_PARTS",
    "POWERS",
    "PRODUCTS",
    "REVERSE_DIVISIONS",
    "SCALAR_SUMS",
    "SHIFT_KEEPING",
    "SOFTMAX",
    "SOLVES",
    "SUMS_OF_PRODUCT",
    "WEIGHT_KEEPING",
    "operation_name",
]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def operation_name(func: Callable) -> str:
    """'mul' for torch.mul, Tensor.mul and aten.mul.Tensor."""
    name = getattr(func, "__name__", type(func).__name__).split(".")[0]
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # x.T is 'T'


# One tensor in, the same numbers out: a mark rides along.
MARK_KEEPING = _names(
    """view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose t permute movedim moveaxis swapaxes
    swapdims expand expand_as broadcast_to contiguous clone to type type_as float double half bfloat16 cpu cuda chunk
    split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind select narrow __getitem__ index_select gather
    take take_along_dim topk sort repeat repeat_interleave tile roll flip rot90 masked_fill masked_select alias
    _to_copy view_as_real view_as_complex T mT H mH tril triu neg negative"""
)

# What softmax weights are put together with: a router's, before they meet the experts.
WEIGHT_KEEPING = _names(
    """cat concat concatenate stack hstack vstack dstack column_stack where scatter scatter_ scatter_add scatter_add_
    index_put index_put_ sum max amax pad constant_pad_nd as_strided"""
)

# What an activation plus a number is summed up, masked or put together with, as in linear attention (lxt.shifted).
SHIFT_KEEPING = _names(
    """sum mean cumsum where cat concat concatenate stack hstack vstack dstack column_stack pad constant_pad_nd"""
)

# The plain gradient is the rule: linear maps, selections, homogeneous functions of degree one, losses and queries.
LINEAR = _names(
    """add __add__ __radd__ __iadd__ add_ sub subtract __sub__ sub_ __isub__ rsub __rsub__ neg_ positive
    sum nansum mean nanmean cumsum diff trapezoid cat concat concatenate stack hstack vstack dstack column_stack
    block_diag index_add index_add_ index_put index_put_ _index_put_impl_ index_copy index_copy_ index_fill index_fill_
    scatter scatter_ scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_reduce index_reduce_
    select_scatter slice_scatter diagonal_scatter masked_scatter
    masked_scatter_ masked_fill_ __setitem__ copy_ where pad constant_pad_nd tril_ triu_ diagonal diag
    diag_embed trace meshgrid unfold fold im2col col2im as_strided swapaxes_ squeeze_ unsqueeze_ transpose_ t_
    embedding embedding_bag max min amax amin maximum minimum fmax fmin aminmax median mode kthvalue abs absolute abs_
    nan_to_num nan_to_num_ avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d max_pool1d
    max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool1d_with_indices max_pool2d_with_indices
    upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa upsample_linear1d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d grid_sampler pixel_shuffle pixel_unshuffle channel_shuffle
    batch_norm fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_hfft fft_ihfft fft_fft fft_ifft fft_fft2
    fft_ifft2 fft_fftn fft_ifftn fft_fftshift fft_ifftshift complex real imag conj resolve_conj resolve_neg
    cummax cummin msort cross_entropy
    cross_entropy_loss nll_loss mse_loss l1_loss
    __get__ __set__ data grad grad_fn shape dtype device is_leaf
    requires_grad layout itemsize nbytes ndim names is_sparse is_cuda is_cpu is_meta is_mps is_quantized is_nested
    is_mkldnn output_nr _version retains_grad _base _grad volatile _backward_hooks
    __delete__ numel size dim stride is_contiguous __len__ __bool__ __int__ __float__ __index__
    __contains__ item tolist numpy __array__ __repr__ __format__ __str__ __hash__ __deepcopy__ __reduce_ex__ backward
    register_hook register_post_accumulate_grad_hook retain_grad requires_grad_ detach detach_ data_ptr"""
)

PRODUCTS = _names("mul multiply __mul__ __rmul__")
MATRIX_PRODUCTS = _names(
    """matmul __matmul__ __rmatmul__ bmm mm mv dot inner outer ger vdot tensordot kron chain_matmul multi_dot
    linalg_multi_dot linalg_vecdot einsum _grouped_mm grouped_mm grouped_mm_fallback"""
)
SUMS_OF_PRODUCT = _names("addmm baddbmm addbmm addmv addr addcmul")  # (summand, factor, factor)
LINEAR_LAYERS = _names("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
DIVISIONS = _names("div divide true_divide __truediv__ cholesky_solve")
REVERSE_DIVISIONS = _names("__rdiv__ __rtruediv__")
SOLVES = _names("linalg_solve linalg_solve_ex linalg_solve_triangular")  # (matrix, right-hand side)
POWERS = _names("pow __pow__ float_power")
SOFTMAX = _names("softmax special_softmax _softmax")
DROPOUTS = _names(
    "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout alpha_dropout_ feature_dropout feature_dropout_ "
    "feature_alpha_dropout feature_alpha_dropout_ native_dropout"
)
SCALAR_SUMS = _names("add __add__ __radd__ sub subtract __sub__ rsub __rsub__")

# What norms are written with: roots and statistics.
NORM_PARTS = _names(
    """rsqrt sqrt reciprocal norm vector_norm linalg_vector_norm linalg_norm matrix_norm var std var_mean std_mean"""
)
# f(0) is not 0, or no share of relevance is defined: gates, decays, denominators.
CONSTANT = _names(
    """logsumexp logcumsumexp cumprod prod cdist exp exp2 log log2 log10 cos sin cosh acos sigmoid expit special_expit
    inverse linalg_inv linalg_inv_ex linalg_pinv
    hardsigmoid softplus logsigmoid log_sigmoid logaddexp __rpow__ erfc special_erfc fmod remainder __mod__ sign sgn
    ceil floor round fix trunc floor_divide __floordiv__ heaviside"""
)

# Element-wise functions with f(0) = 0 -> their closed form in lxt.coefficients.
CLOSED_FORMS = {
    name: form
    for form, names in {
        "silu": "silu",
        "mish": "mish",
        "relu": "relu",
        "tanh": "tanh",
        "relu6": "relu6",
        "hardswish": "hardswish",
        "softsign": "softsign",
        "erf": "erf special_erf",
        "expm1": "expm1 special_expm1",
        "asinh": "asinh arcsinh",
        "atan": "atan arctan",
        "sinh": "sinh",
        "tan": "tan",
        "log1p": "log1p special_log1p",
    }.items()
    for name in names.split()
}
# The same without a closed form: torch computes these with relative accuracy near 0, so f(x) / x does.
BY_RATIO = _names(
    "leaky_relu prelu elu selu celu hardtanh softshrink hardshrink tanhshrink threshold clamp clip clamp_min clamp_max"
)
BOUNDS = _names("clamp clip clamp_min clamp_max")
IN_PLACE_DUNDERS = {"__imul__": "mul", "__itruediv__": "div", "__idiv__": "div", "__ipow__": "pow"}

# Everything above: where a composite asks for the gradient, these run as they are and not as unknown.
KNOWN = (
    LINEAR | PRODUCTS | MATRIX_PRODUCTS | SUMS_OF_PRODUCT | LINEAR_LAYERS | DIVISIONS | REVERSE_DIVISIONS | POWERS
    | SOLVES | SOFTMAX | DROPOUTS | NORM_PARTS | CONSTANT | frozenset(CLOSED_FORMS) | BY_RATIO
    | _names("layer_norm rms_norm group_norm gelu glu square log_softmax scaled_dot_product_attention")
)  # fmt: skip
KNOWN |= {name + "_" for name in KNOWN} | set(IN_PLACE_DUNDERS)
