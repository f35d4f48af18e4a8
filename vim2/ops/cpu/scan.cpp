// The selective scan on CPUs, forward and backward (vim2/ops/reference.py says what it computes).
//
// C++17 with vector extensions: no Python, no torch, no C++ runtime. Compiled once per instruction set; LANES channels
// are one register. A job is one image and a range of blocks of LANES channels. It walks the scan in chunks of up to
// CHUNK steps. In each, block by block, step sizes and inputs are read into tiles (CHUNK vectors each, in the first
// cache), a few states at a time step through the chunk in registers, and the outputs are written. States reach memory
// at the chunks' borders alone: the backward starts again from there. The sums' order depends on the shapes alone, so
// that results do not depend on the number of threads.
#include "vectors.h"
#include <stdlib.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

constexpr int CHUNK = 64, PATHS = 11;

// ---- what is passed in (vim2/ops/cpu/__init__.py lays it out) -------------------------------------------------------

struct Tensor {  // a view; strides in bytes, 0 along an axis that the tensor lacks or is constant along
    char *data;
    i64 type, path;  // which of the scan's paths its positions follow
    i64 part, image, direction, group, channel, state;

    char *at(i64 i, i64 k, i64 c = 0) const { return data + i * image + k * direction + c * channel; }
};

struct Scan {
    i64 next_job, images, directions, channels, states, height, width, groups, groups_b, groups_c, parts, softplus;
    float *saved;          // states at the chunks' borders, or null
    i64 saved_image;       // floats of an image there: what narrower registers than 16 lanes leave over is between images
    i64 order[4];          // of each direction: 0 row-major, 1 column-major, 2 and 3 their reverses
    i64 paths;             // ways to lay out positions
    i64 step[PATHS][2];    // bytes from row to row and from column to column
    Tensor u, delta, A, B, C, D, z, bias, out, last;
    Tensor grad_out, grad_last, grad_u, grad_delta, grad_z, grad_A, grad_B, grad_C, grad_D, grad_bias;
};

// ---- how a scan is cut ----------------------------------------------------------------------------------------------

// Blocks do not cross the border of a group; a part is a range of them; chunks are of about the same length
struct Cut {
    i64 group_channels, group_blocks, blocks, part_blocks, chunks, most, jobs;

    explicit Cut(const Scan &p) {
        group_channels = p.channels / p.groups, group_blocks = (group_channels + LANES - 1) / LANES;
        blocks = p.groups * group_blocks, part_blocks = (blocks + p.parts - 1) / p.parts;
        chunks = (p.height * p.width + CHUNK - 1) / CHUNK, most = (p.height * p.width + chunks - 1) / chunks;
        jobs = p.images * p.parts;
    }
};

struct Job {
    i64 image, part, first, last;  // blocks

    Job(const Scan &p, const Cut &cut, i64 job) : image(job / p.parts), part(job % p.parts) {
        first = part * cut.part_blocks;
        last = first + cut.part_blocks < cut.blocks ? first + cut.part_blocks : cut.blocks;
    }
};

// A block's states at the start of a chunk, a vector each
static float *saved_states(const Scan &p, const Cut &cut, i64 image, int k, i64 chunk, i64 block) {
    return p.saved + image * p.saved_image + LANES * p.states * ((k * cut.chunks + chunk) * cut.blocks + block);
}

static i64 take_job(Scan &p) { return __atomic_fetch_add(&p.next_job, 1, __ATOMIC_RELAXED); }

// A chunk of direction k, and where each path is at its steps
struct Chunk {
    int k = 0, steps = 0;
    i64 index = 0;
    i64 offset[PATHS][CHUNK] = {};

    void set(const Scan &p, const Cut &cut, int direction, i64 chunk) {
        k = direction, index = chunk;
        const bool down = p.order[k] & 1, reverse = p.order[k] & 2;
        const i64 length = p.height * p.width, inner = down ? p.height : p.width, first = index * cut.most;
        steps = int(length - first < cut.most ? length - first : cut.most);
        const i64 start = reverse ? length - 1 - first : first;
        i64 outer = start / inner, i = start % inner, row[CHUNK], column[CHUNK];
        for (int t = 0; t < steps; t++) {
            row[t] = down ? i : outer, column[t] = down ? outer : i;
            if (reverse) { if (--i < 0) i = inner - 1, outer--; }
            else if (++i == inner) i = 0, outer++;
        }
        for (i64 path = 0; path < p.paths; path++)
            for (int t = 0; t < steps; t++)
                offset[path][t] = row[t] * p.step[path][0] + column[t] * p.step[path][1];
    }
};

struct Memory {  // vectors, aligned; none if there is none left
    void *raw;
    vf *vectors;

    explicit Memory(i64 count) : raw(malloc(sizeof(vf) * (count + 1))),
        vectors((vf *)(((uintptr_t)raw + sizeof(vf) - 1) / sizeof(vf) * sizeof(vf))) {}
    ~Memory() { free(raw); }
};

// ---- reading and writing a chunk of a block of channels -------------------------------------------------------------

// Where the vectors of a chunk and a block are
struct View {
    char *data;
    const i64 *offset;

    float *at(int t) const { return (float *)(data + offset[t]); }
};

static const struct Identity {
    i64 offset[CHUNK];
    constexpr Identity() : offset() { for (int t = 0; t < CHUNK; t++) offset[t] = t * i64(sizeof(vf)); }
} identity;

static View tile_view(vf *tile) { return {(char *)tile, identity.offset}; }

// Whether what is at these offsets are neighbours in memory: 1 upwards, -1 downwards, 0 no
static int runs(const Tensor &x, const i64 *offset, int count) {
    if (count < LANES) return 0;
    const i64 size = x.type == FLOAT ? 4 : 2, along = offset[1] - offset[0];
    const bool even = offset[count - 1] - offset[0] == along * (count - 1);
    return even && (along == size || along == -size) ? int(along / size) : 0;
}

// Up to LANES channels; vectors of them have 0 in the lanes beyond
struct Block {
    i64 channel, group;
    int lanes;

    Block(const Cut &cut, i64 block) : group(block / cut.group_blocks) {
        const i64 i = block % cut.group_blocks * LANES;
        channel = group * cut.group_channels + i;
        lanes = int(cut.group_channels - i < LANES ? cut.group_channels - i : LANES);
    }
    bool in_place(const Tensor &x) const { return lanes == LANES && x.channel == 4 && x.type == FLOAT; }

    // `count` vectors, at these offsets from `origin`. Where not channels but positions are neighbours, LANES at a time
    // are read along memory and transposed; if they are not a multiple of LANES, some of the last ones twice.
    void gather(const Tensor &x, const char *origin, const i64 *offset, int count, vf *tile) const {
        const int run = lanes == LANES && x.channel != (x.type == FLOAT ? 4 : 2) ? runs(x, offset, count) : 0;
        for (int t = 0; run && t < count; t += LANES) {
            const int first = t + LANES <= count ? t : count - LANES, lowest = run > 0 ? first : first + LANES - 1;
            const char *p = origin + offset[lowest];
            vf v[LANES];
            if (x.type == FLOAT) each_lane([&](int i) { v[i] = load((const float *)(p + i * x.channel)); }, all_lanes);
            else for (int i = 0; i < LANES; i++) v[i] = ::gather(x.type, 2, p + i * x.channel, LANES);
            transpose(v);
            each_lane([&](int i) { tile[lowest + run * i] = v[i]; }, all_lanes);
        }
        for (int t = 0; !run && t < count; t++) tile[t] = ::gather(x.type, x.channel, origin + offset[t], lanes);
    }
    void scatter(const vf *tile, const Tensor &x, char *origin, const i64 *offset, int count) const {
        const int run = lanes == LANES && x.channel != (x.type == FLOAT ? 4 : 2) ? runs(x, offset, count) : 0;
        for (int t = 0; run && t < count; t += LANES) {
            const int first = t + LANES <= count ? t : count - LANES, lowest = run > 0 ? first : first + LANES - 1;
            char *p = origin + offset[lowest];
            vf v[LANES];
            each_lane([&](int i) { v[i] = tile[lowest + run * i]; }, all_lanes);
            transpose(v);
            if (x.type == FLOAT) each_lane([&](int i) { store((float *)(p + i * x.channel), v[i]); }, all_lanes);
            else for (int i = 0; i < LANES; i++) ::scatter(x.type, 2, p + i * x.channel, LANES, v[i]);
        }
        for (int t = 0; !run && t < count; t++) ::scatter(x.type, x.channel, origin + offset[t], lanes, tile[t]);
    }

    // A chunk, in place if its channels are neighbours in memory, else in a tile that it is gathered into
    View read(const Tensor &x, i64 image, const Chunk &chunk, vf *tile) const {
        char *origin = x.at(image, chunk.k, channel);
        if (in_place(x)) return {origin, chunk.offset[x.path]};
        gather(x, origin, chunk.offset[x.path], chunk.steps, tile);
        return tile_view(tile);
    }
    // Where to write a chunk: in place, or in a tile for `finish_write`. Directions after the first add to what is there.
    View write(const Tensor &x, i64 image, const Chunk &chunk, vf *tile, bool add) const {
        if (add) return read(x, image, chunk, tile);
        return in_place(x) ? View{x.at(image, chunk.k, channel), chunk.offset[x.path]} : tile_view(tile);
    }
    void finish_write(const vf *tile, const Tensor &x, i64 image, const Chunk &chunk) const {
        if (!in_place(x)) scatter(tile, x, x.at(image, chunk.k, channel), chunk.offset[x.path], chunk.steps);
    }

    vf parameter(const Tensor &x, int k) const {
        return x.data ? ::gather(x.type, x.channel, x.at(0, k, channel), lanes) : vf{};
    }
    // One vector a state
    void read_states(const Tensor &x, i64 image, int k, int states, vf *to) const {
        i64 offset[CHUNK];
        for (int n = 0; n < states; n += CHUNK) {
            const int count = states - n < CHUNK ? states - n : CHUNK;
            for (int i = 0; i < count; i++) offset[i] = (n + i) * x.state;
            gather(x, x.at(image, k, channel), offset, count, to + n);
        }
    }
    void write_states(const vf *from, const Tensor &x, i64 image, int k, int states) const {
        for (int n = 0; n < states; n++)
            ::scatter(x.type, x.channel, x.at(image, k, channel) + n * x.state, lanes, from[n]);
    }
};

// B or C of a chunk, `states` numbers a step; the rows have room for LANES more
static void read_rows(const Tensor &x, i64 image, i64 group, const Chunk &chunk, int states, float *rows) {
    const char *origin = x.at(image, chunk.k) + group * x.group;
    for (int t = 0; t < chunk.steps; t++, rows += states) {
        const char *p = origin + chunk.offset[x.path][t];
        if (x.type == FLOAT && x.state == 4) memcpy(rows, p, sizeof(float) * states);
        else for (int n = 0; n < states; n += LANES)
            store(rows + n, gather(x.type, x.state, p + n * x.state, states - n < LANES ? states - n : LANES));
    }
}

// Asks for memory that is read and written soon, one register's worth of each stream at a time, while the recurrence,
// which hardly uses the memory, runs. Where channels are neighbours: the job's next chunk, position by position, of which
// each of this chunk's blocks asks for its share. Where positions are: the next block, channel by channel.
template <int STREAMS>
struct Ahead {
    const char *data[STREAMS];
    const i64 *offset;  // of the rows
    int row = 0, line = 0, lines;
    bool on;            // not for streams that differ in how they move

    Ahead(const Tensor *const (&streams)[STREAMS], const Cut &cut, const Job &job, const Chunk &chunk, i64 block,
          const Job &next_job, const Chunk &next, const i64 *channels) {
        const Tensor &x = *streams[0];
        const bool along = x.channel != 4, more = along && block + 1 < job.last;
        const Block there(cut, more ? block + 1 : next_job.first);
        const Chunk &then = more ? chunk : next;
        const i64 *positions = then.offset[x.path], end = positions[then.steps - 1];
        on = x.type == FLOAT && there.lanes == LANES && (!along || runs(x, positions, then.steps));
        for (int i = 0; i < STREAMS; i++) {
            const Tensor &y = *streams[i];
            on &= y.type == FLOAT && y.path == x.path && y.channel == x.channel;
            data[i] = y.at(more ? job.image : next_job.image, then.k, there.channel);
            if (along) data[i] += end < positions[0] ? end : positions[0];
        }
        offset = along ? channels : positions;
        lines = int(along ? (then.steps + LANES - 1) / LANES : job.last - job.first);
        if (!along) row = int((block - job.first) * CHUNK / lines), line = int((block - job.first) * CHUNK % lines);
    }
    void fetch() {
        const i64 at = offset[row] + line * i64(sizeof(vf));
        UNROLL (int i = 0; i < STREAMS; i++) __builtin_prefetch(data[i] + at, 0, 2);
        if (++line == lines) line = 0, row++;
    }
};

// What is computed for a chunk and a block before, in and after the recurrence
struct Tiles {
    vf dt[CHUNK], x[CHUNK], y[CHUNK];                    // step sizes, times inputs, outputs
    vf slope[CHUNK], gy[CHUNK], gx[CHUNK], gd[CHUNK];    // d softplus; gradients of y, x, and of dt through the decay
    vf gz[CHUNK];                                        // gradient of z over y
    vf gathered[7][CHUNK];
};

// ---- forward --------------------------------------------------------------------------------------------------------

// Step sizes, inputs dt u, and what y is before the states are added to it: D u and the sum over directions so far
static void prepare(const Scan &p, const Chunk &chunk, View u, View delta, View out, vf bias, vf skip, Tiles &s) {
    const bool softplus = p.softplus, add = chunk.k > 0;
    for (int t = 0; t < chunk.steps; t++) {
        vf ut = load(u.at(t)), d = load(delta.at(t)) + bias;
        if (softplus) d = max0(d) + log1p(decay_of(d));
        s.dt[t] = d, s.x[t] = d * ut, s.y[t] = skip * ut;
        if (add) s.y[t] += load(out.at(t));
        __builtin_prefetch(u.at(t) + LANES), __builtin_prefetch(delta.at(t) + LANES);  // the next block
        __builtin_prefetch(out.at(t) + LANES);
    }
}

// The recurrence of R states: updates h, adds <C, h> to y
template <int R>
static void recur(Ahead<3> ahead, int steps, int states, const Tiles &s, View to, const float *b, const float *c,
                  const vf *decay, vf *state) {
    vf h[R], a[R];
    UNROLL (int n = 0; n < R; n++) h[n] = state[n], a[n] = decay[n];
    for (int t = 0; t < steps; t++, b += states, c += states) {
        vf y = s.y[t];
        if (ahead.on) ahead.fetch();
        UNROLL (int n = 0; n < R; n++) {
            h[n] = exp2(s.dt[t] * a[n]) * h[n] + s.x[t] * b[n];
            y += h[n] * c[n];
        }
        store(to.at(t), y);
    }
    UNROLL (int n = 0; n < R; n++) state[n] = h[n];
}

static void gate(int steps, const Tiles &s, View z, View out) {
    for (int t = 0; t < steps; t++) {
        const vf x = load(z.at(t));
        store(out.at(t), s.y[t] * (x * sigmoid(x, decay_of(x))));
    }
}

extern "C" EXPORT void vim2_scan_forward(Scan *scan) {
    Scan &p = *scan;
    const Cut cut(p);
    const int states = int(p.states);
    const i64 each = cut.part_blocks * states, row_vectors = CHUNK * states / LANES + 2;
    Memory memory(2 * each + 2 * row_vectors);
    if (!memory.raw) return;  // the caller finds jobs that nobody took
    vf *h = memory.vectors, *decay = h + each;
    float *rows_b = (float *)(decay + each), *rows_c = rows_b + LANES * row_vectors;
    Tiles s;
    Chunk chunks[2], *chunk = &chunks[0], *next = &chunks[1];
    i64 channels[CHUNK];
    for (int i = 0; i < CHUNK; i++) channels[i] = i % LANES * p.u.channel;

    chunk->set(p, cut, 0, 0);
    for (i64 number; (number = take_job(p)) < cut.jobs;) {
        const Job job(p, cut, number);
        for (int k = 0; k < p.directions; k++) {
            for (i64 block = job.first; block < job.last; block++) {
                vf *a = decay + (block - job.first) * states;
                Block(cut, block).read_states(p.A, 0, k, states, a);
                for (int n = 0; n < states; n++) a[n] *= LOG2E;
            }
            memset((void *)h, 0, sizeof(vf) * each);
            for (i64 index = 0; index < cut.chunks; index++) {
                // what follows the last chunk is the first one of the next direction or job
                const bool over = index + 1 == cut.chunks, end = over && k + 1 == p.directions;
                next->set(p, cut, end ? 0 : k + over, over ? 0 : index + 1);
                const i64 soon = end ? __atomic_load_n(&p.next_job, __ATOMIC_RELAXED) : number;
                const Job next_job(p, cut, soon < cut.jobs ? soon : number);
                const int steps = chunk->steps;
                i64 group = -1;
                for (i64 block = job.first; block < job.last; block++) {
                    const Block here(cut, block);
                    vf *state = h + (block - job.first) * states, *a = decay + (block - job.first) * states;
                    if (here.group != group) {
                        group = here.group;
                        read_rows(p.B, job.image, group * p.groups_b / p.groups, *chunk, states, rows_b);
                        read_rows(p.C, job.image, group * p.groups_c / p.groups, *chunk, states, rows_c);
                    }
                    if (p.saved) memcpy(saved_states(p, cut, job.image, k, index, block), state, sizeof(vf) * states);
                    Ahead<3> ahead({&p.u, &p.delta, &p.out}, cut, job, *chunk, block, next_job, *next, channels);
                    const View u = here.read(p.u, job.image, *chunk, s.gathered[0]);
                    const View delta = here.read(p.delta, job.image, *chunk, s.gathered[1]);
                    const View out = here.write(p.out, job.image, *chunk, s.gathered[2], k > 0);
                    const bool gated = p.z.data && k + 1 == p.directions;
                    prepare(p, *chunk, u, delta, out, here.parameter(p.bias, k), here.parameter(p.D, k), s);
                    for (int n = 0; n < states;) {
                        const int count = states - n >= 8 ? 8 : states - n >= 4 ? 4 : 1, after = n + count;
                        const View to = after == states && !gated ? out : tile_view(s.y);
                        (count == 8 ? recur<8> : count == 4 ? recur<4> : recur<1>)(
                            ahead, steps, states, s, to, rows_b + n,
                            rows_c + n, a + n, state + n);
                        n = after, ahead.on = false;
                    }
                    if (gated) gate(steps, s, here.read(p.z, job.image, *chunk, s.gathered[3]), out);
                    here.finish_write(s.gathered[2], p.out, job.image, *chunk);
                }
                Chunk *const done = chunk;
                chunk = next, next = done;
            }
            for (i64 block = job.first; p.last.data && block < job.last; block++)
                Block(cut, block).write_states(h + (block - job.first) * states, p.last, job.image, k, states);
        }
    }
}

// ---- backward -------------------------------------------------------------------------------------------------------

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

static int folded(int states) { return states / 4 + states % 4; }  // vectors that `states` states fold to

// Adds the sums of a chunk's folded vectors to the gradient of B or C, and clears them
static void add_rows(const Tensor &x, const Job &job, i64 group, const Chunk &chunk, int states, vf (*sums)[2],
                     int which) {
    char *origin = x.at(job.image, chunk.k) + job.part * x.part + group * x.group;
    for (int t = 0; t < chunk.steps; t++) {
        char *p = origin + chunk.offset[x.path][t];
        for (int n = 0; n < states; sums++) {
            const quad *quads = (const quad *)&sums[0][which];
            quad four = quads[0];
            UNROLL (int i = 1; i < LANES / 4; i++) four += quads[i];
            const int count = n + 4 <= states ? 4 : 1;
            if (count == 1) four[0] += four[1] + four[2] + four[3];
            if (count == 4 && x.state == 4) *(quad *)p += four;
            else for (int i = 0; i < count; i++) *(float *)(p + i * x.state) += four[i];
            n += count, p += count * x.state;
            sums[0][which] = vf{};
        }
    }
}

// Gradient of y from that of silu(z) y; and D u, which y starts with
static View prepare_gate(int steps, View u, View grad_out, View z, vf skip, Tiles &s) {
    for (int t = 0; t < steps; t++) {
        const vf g = load(grad_out.at(t)), x = load(z.at(t)), slope = sigmoid(x, decay_of(x));
        s.gz[t] = g * slope * (x * (1.f - slope) + 1.f);
        s.gy[t] = g * (x * slope), s.y[t] = skip * load(u.at(t));
    }
    return tile_view(s.gy);
}

// Step sizes, their slope (d softplus) and inputs dt u; returns the sum of u times the output's gradient
static vf prepare_backward(const Scan &p, const Chunk &chunk, View u, View delta, View grad_y, View grad_u,
                           View grad_delta, vf bias, Tiles &s) {
    const bool softplus = p.softplus;
    vf total = {};
    for (int t = 0; t < chunk.steps; t++) {
        vf ut = load(u.at(t)), d = load(delta.at(t)) + bias;
        s.gy[t] = load(grad_y.at(t));
        total += ut * s.gy[t];
        if (softplus) {
            const vf e = decay_of(d);
            s.slope[t] = sigmoid(d, e);
            d = max0(d) + log1p(e);
        }
        s.dt[t] = d, s.x[t] = d * ut, s.gx[t] = s.gd[t] = vf{};
        __builtin_prefetch(u.at(t) + LANES), __builtin_prefetch(delta.at(t) + LANES);
        __builtin_prefetch(grad_y.at(t) + LANES), __builtin_prefetch(grad_u.at(t) + LANES);
        __builtin_prefetch(grad_delta.at(t) + LANES);
    }
    return total;
}

// R states through a chunk, recomputed from those at its start, then their adjoints g back through it. Adds to y if
// it is wanted, to the gradients of A, of dt u (gx) and of dt through the decay (gd), and, folded, to those of B and C.
template <int R>
static void adjoint(Ahead<5> ahead, bool want_y, int steps, int states, Tiles &s, const float *b, const float *c,
                    const vf *decay, const float *saved, vf *carry, vf *grad_a, vf (*sums)[2]) {
    vf before[CHUNK][R], rate[CHUNK][R], h[R], a[R], g[R], ga[R];
    UNROLL (int n = 0; n < R; n++) h[n] = load(saved + n * LANES), a[n] = decay[n];
    for (int t = 0; t < steps; t++, b += states, c += states) {
        if (ahead.on) ahead.fetch();
        UNROLL (int n = 0; n < R; n++) {
            before[t][n] = h[n];
            rate[t][n] = exp2(s.dt[t] * a[n]);
            h[n] = rate[t][n] * h[n] + s.x[t] * b[n];
        }
        if (want_y) UNROLL (int n = 0; n < R; n++) s.y[t] += h[n] * c[n];
    }
    UNROLL (int n = 0; n < R; n++) {
        a[n] = a[n] < -1e30f ? splat(-1e30f) : a[n] * LN2;  // finite: times a decay of 0 it is 0
        g[n] = carry[n], ga[n] = grad_a[n];
    }
    sums += steps * folded(states);
    for (int t = steps - 1; t >= 0; t--) {
        vf gx = s.gx[t], gd = s.gd[t], to_b[R], to_c[R];
        b -= states, c -= states, sums -= folded(states);
        UNROLL (int n = 0; n < R; n++) {
            to_c[n] = s.gy[t] * h[n];
            g[n] += s.gy[t] * c[n];
            to_b[n] = g[n] * s.x[t];
            gx += g[n] * b[n];
            h[n] = before[t][n];
            g[n] *= rate[t][n];
            vf through = g[n] * h[n];
            ga[n] += through * s.dt[t];
            gd += through * a[n];
        }
        sums[0][0] += R == 1 ? to_b[0] : fold4(to_b);
        sums[0][1] += R == 1 ? to_c[0] : fold4(to_c);
        s.gx[t] = gx, s.gd[t] = gd;
    }
    UNROLL (int n = 0; n < R; n++) carry[n] = g[n], grad_a[n] = ga[n];
}

// Gradients of u and delta from those of dt u and dt; returns the sum of the latter
static vf finish_backward(const Scan &p, const Chunk &chunk, View u, View grad_u, View grad_delta, vf skip,
                          const Tiles &s) {
    const bool softplus = p.softplus, add = chunk.k > 0;
    vf total = {};
    for (int t = 0; t < chunk.steps; t++) {
        vf g = s.gx[t] * load(u.at(t)) + s.gd[t], gu = s.gx[t] * s.dt[t] + skip * s.gy[t];
        if (softplus) g *= s.slope[t];
        if (add) gu += load(grad_u.at(t));
        store(grad_delta.at(t), g), store(grad_u.at(t), gu);
        total += g;
    }
    return total;
}

static void finish_gate(const Chunk &chunk, View grad_z, const Tiles &s) {
    for (int t = 0; t < chunk.steps; t++) {
        vf g = s.y[t] * s.gz[t];
        if (chunk.k > 0) g += load(grad_z.at(t));
        store(grad_z.at(t), g);
    }
}

extern "C" EXPORT void vim2_scan_backward(Scan *scan) {
    Scan &p = *scan;
    const Cut cut(p);
    const int states = int(p.states), slots = folded(states);
    const i64 each = cut.part_blocks * states, row_vectors = CHUNK * states / LANES + 2;
    Memory memory(3 * each + 2 * cut.part_blocks + 2 * CHUNK * slots + 2 * row_vectors);
    if (!memory.raw) return;
    vf *decay = memory.vectors, *carry = decay + each, *sum_a = carry + each, *sum_d = sum_a + each;
    vf *sum_bias = sum_d + cut.part_blocks;
    vf (*sums)[2] = (vf (*)[2])(sum_bias + cut.part_blocks);  // of a chunk's gradients of B and C
    float *rows_b = (float *)(sums + CHUNK * slots), *rows_c = rows_b + LANES * row_vectors;
    memset((void *)sums, 0, sizeof(vf) * 2 * CHUNK * slots);
    Tiles s;
    Chunk chunks[2], *chunk = &chunks[0], *next = &chunks[1];
    i64 channels[CHUNK];
    for (int i = 0; i < CHUNK; i++) channels[i] = i % LANES * p.u.channel;

    chunk->set(p, cut, 0, cut.chunks - 1);
    for (i64 number; (number = take_job(p)) < cut.jobs;) {
        const Job job(p, cut, number);
        for (int k = 0; k < p.directions; k++) {
            memset((void *)carry, 0, sizeof(vf) * (2 * each + 2 * cut.part_blocks));
            for (i64 block = job.first; block < job.last; block++) {
                const Block here(cut, block);
                const i64 at = (block - job.first) * states;
                here.read_states(p.A, 0, k, states, decay + at);
                for (int n = 0; n < states; n++) decay[at + n] *= LOG2E;
                if (p.grad_last.data) here.read_states(p.grad_last, job.image, k, states, carry + at);
            }
            for (i64 index = cut.chunks - 1; index >= 0; index--) {
                const bool over = index == 0, end = over && k + 1 == p.directions;
                next->set(p, cut, end ? 0 : k + over, over ? cut.chunks - 1 : index - 1);
                const i64 soon = end ? __atomic_load_n(&p.next_job, __ATOMIC_RELAXED) : number;
                const Job next_job(p, cut, soon < cut.jobs ? soon : number);
                const int steps = chunk->steps;
                i64 group = -1;
                auto finish_group = [&]() {
                    add_rows(p.grad_B, job, group * p.groups_b / p.groups, *chunk, states, sums, 0);
                    add_rows(p.grad_C, job, group * p.groups_c / p.groups, *chunk, states, sums, 1);
                };
                for (i64 block = job.first; block < job.last; block++) {
                    const Block here(cut, block);
                    const i64 i = block - job.first, at = i * states;
                    if (here.group != group) {
                        if (group >= 0) finish_group();
                        group = here.group;
                        read_rows(p.B, job.image, group * p.groups_b / p.groups, *chunk, states, rows_b);
                        read_rows(p.C, job.image, group * p.groups_c / p.groups, *chunk, states, rows_c);
                    }
                    Ahead<5> ahead({&p.u, &p.delta, &p.grad_out, &p.grad_u, &p.grad_delta}, cut, job, *chunk, block,
                                   next_job, *next, channels);
                    const View u = here.read(p.u, job.image, *chunk, s.gathered[0]);
                    const View delta = here.read(p.delta, job.image, *chunk, s.gathered[1]);
                    View grad_y = here.read(p.grad_out, job.image, *chunk, s.gathered[2]);
                    const View grad_u = here.write(p.grad_u, job.image, *chunk, s.gathered[3], k > 0);
                    const View grad_delta = here.write(p.grad_delta, job.image, *chunk, s.gathered[4], false);
                    const vf skip = here.parameter(p.D, k);
                    const bool gated = p.z.data;
                    if (gated)
                        grad_y = prepare_gate(steps, u, grad_y, here.read(p.z, job.image, *chunk, s.gathered[5]), skip, s);
                    sum_d[i] += prepare_backward(p, *chunk, u, delta, grad_y, grad_u, grad_delta,
                                                 here.parameter(p.bias, k), s);
                    const float *saved = saved_states(p, cut, job.image, k, index, block);
                    for (int n = 0, j = 0; n < states; j++) {
                        const int count = n + 4 <= states ? 4 : 1;
                        (count == 4 ? adjoint<4> : adjoint<1>)(
                            ahead, gated, steps, states, s, rows_b + n, rows_c + n,
                            decay + at + n, saved + LANES * n, carry + at + n, sum_a + at + n,
                            sums + j);
                        n += count, ahead.on = false;
                    }
                    sum_bias[i] += finish_backward(p, *chunk, u, grad_u, grad_delta, skip, s);
                    here.finish_write(s.gathered[3], p.grad_u, job.image, *chunk);
                    here.finish_write(s.gathered[4], p.grad_delta, job.image, *chunk);
                    if (gated) {
                        finish_gate(*chunk, here.write(p.grad_z, job.image, *chunk, s.gathered[6], k > 0), s);
                        here.finish_write(s.gathered[6], p.grad_z, job.image, *chunk);
                    }
                }
                finish_group();
                Chunk *const done = chunk;
                chunk = next, next = done;
            }
            for (i64 block = job.first; block < job.last; block++) {
                const Block here(cut, block);
                const i64 i = block - job.first;
                here.write_states(sum_a + i * states, p.grad_A, job.image, k, states);
                here.write_states(sum_d + i, p.grad_D, job.image, k, 1);
                here.write_states(sum_bias + i, p.grad_bias, job.image, k, 1);
            }
        }
    }
}

extern "C" EXPORT i64 vim2_scan_version() { return VERSION; }
