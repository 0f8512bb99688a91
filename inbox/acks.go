package inbox

import (
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// acks acknowledges the deliveries of one channel, a moment after they are settled, many
// at once: a quorum queue writes each acknowledgement to its log, which costs RabbitMQ as
// much as the delivery itself.
type acks struct {
	mu      sync.Mutex
	channel *amqp.Channel
	most    int             // deliveries that wait to be acknowledged
	next    uint64          // all deliveries before this one are settled
	ahead   map[uint64]bool // and these, after it
	waiting map[uint64]bool // settled, not acknowledged yet; true: since before the last flush
	some    chan struct{}   // there are some
}

const (
	// ackDelay is how long an acknowledgement waits for others.
	ackDelay = 10 * time.Millisecond
	// ackMost are acknowledged at once, and a quarter of what RabbitMQ sends ahead: it sends
	// no more while they wait.
	ackMost = 64
)

func newAcks(channel *amqp.Channel, prefetch int) *acks {
	return &acks{
		channel: channel, most: min(ackMost, (prefetch+3)/4), next: 1,
		ahead: make(map[uint64]bool), waiting: make(map[uint64]bool), some: make(chan struct{}, 1),
	}
}

// settled notes deliveries that may be acknowledged.
func (a *acks) settled(tags []uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, tag := range tags {
		a.ahead[tag], a.waiting[tag] = true, false
	}
	for a.ahead[a.next] {
		delete(a.ahead, a.next)
		a.next++
	}
	if len(a.waiting) >= a.most {
		a.flush(false)
	}
	a.notify()
}

func (a *acks) notify() {
	if len(a.waiting) == 0 {
		return
	}
	select {
	case a.some <- struct{}{}:
	default:
	}
}

// run acknowledges what waits until stop is closed, and all of it then.
func (a *acks) run(stop <-chan struct{}) {
	for {
		select {
		case <-a.some:
		case <-stop:
			a.mu.Lock()
			defer a.mu.Unlock()
			a.flush(true)
			return
		}
		select {
		case <-time.After(ackDelay):
		case <-stop:
		}
		a.mu.Lock()
		a.flush(false)
		a.notify()
		a.mu.Unlock()
	}
}

// flush acknowledges what has nothing unsettled before it, with one acknowledgement; of the
// rest what has waited before, or all. An error is the end of the channel: RabbitMQ delivers
// them again, and they are duplicates then. The caller holds mu.
func (a *acks) flush(all bool) {
	var last uint64
	for tag, before := range a.waiting {
		switch {
		case tag < a.next:
			last = max(last, tag)
		case all || before:
			_ = a.channel.Ack(tag, false) // as below
		default:
			a.waiting[tag] = true
			continue
		}
		delete(a.waiting, tag)
	}
	if last > 0 { // which was not acknowledged before: RabbitMQ would close the channel
		_ = a.channel.Ack(last, true) // the channel has ended: they come again
	}
}

// acknowledge acknowledges all deliveries of messages.
func acknowledge(items ...*item) {
	tags := make(map[*acks][]uint64)
	for _, m := range items {
		for _, d := range m.deliveries {
			tags[d.acks] = append(tags[d.acks], d.DeliveryTag)
		}
	}
	for a, all := range tags {
		a.settled(all)
	}
}
