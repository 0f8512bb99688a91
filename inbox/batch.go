package inbox

import (
	"sync"
	"time"
)

// batchSize is how many messages are put into one transaction. Two transactions that update
// many of the same rows, in no order, wait for each other until one of them gives up:
// consumers that do so are faster with smaller batches.
type batchSize struct {
	mu        sync.Mutex
	now, most int
	changed   time.Time
}

// growEvery is how slowly batches grow again: a step too far costs shortLockTimeout, and what
// has been done.
const growEvery = time.Second

func (b *batchSize) get() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.now
}

// shrink makes batches half as large as one of n, which met with others in its way.
func (b *batchSize) shrink(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now, b.changed = max(1, min(b.now, n/2)), time.Now()
}

// grow lets batches be larger by an eighth after one of n has got through, if that was a
// full one.
func (b *batchSize) grow(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n >= b.now && b.now < b.most && time.Since(b.changed) >= growEvery {
		b.now, b.changed = min(b.most, b.now+max(1, b.now/8)), time.Now()
	}
}
