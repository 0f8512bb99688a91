package relay_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/txbox/txbox/outbox"
)

// Relays are paused for longer than their lease, others take over, and the paused
// ones go on where they were: what they still hold is not theirs any more.
func TestPausedRelaysLoseNothingAndKeepOrder(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var children []*os.Process
	for range 3 {
		children = append(children, b.startChild())
	}
	var all []outbox.Message
	paused := map[*os.Process]time.Time{} // until when
	pace := time.NewTicker(40 * time.Millisecond)
	defer pace.Stop()
	for round := range 350 {
		<-pace.C
		messages := b.messages(40, func(int) string { return fmt.Sprint("k", rand.N(20)) })
		b.write(messages...) // one writer: the order of each key is that of all
		all = append(all, messages...)
		child := children[rand.N(len(children))]
		if round%20 == 19 && paused[child].IsZero() && len(paused) < 2 {
			b.must(child.Signal(syscall.SIGSTOP))
			paused[child] = time.Now().Add(1200*time.Millisecond + rand.N(2*time.Second))
		}
		for child, until := range paused {
			if time.Now().After(until) || round == 349 {
				b.must(child.Signal(syscall.SIGCONT))
				delete(paused, child)
			}
		}
	}
	b.eventuallyCount("outbox", 0)
	got := b.drain(b.queue, len(all))
	b.checkAll(got, all, len(all))
	b.checkOrder(got, all)
	if n := b.count("outbox_parked"); n != 0 {
		t.Errorf("%d are parked", n)
	}
	t.Logf("%d messages, %d deliveries", len(all), len(got))
}
