package inbox

import (
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

// acks acknowledges the deliveries of one channel, as many as it can at once.
type acks struct {
	mu      sync.Mutex
	channel *amqp.Channel
	next    uint64          // all deliveries before this one are acknowledged
	ahead   map[uint64]bool // and these
}

func newAcks(channel *amqp.Channel) *acks {
	return &acks{channel: channel, next: 1, ahead: make(map[uint64]bool)}
}

// ack acknowledges deliveries. An error is the end of the channel: RabbitMQ delivers
// them again, and they are duplicates then.
func (a *acks) ack(tags []uint64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, tag := range tags {
		a.ahead[tag] = true
	}
	for a.ahead[a.next] {
		delete(a.ahead, a.next)
		a.next++
	}
	var last uint64 // of them that has none before it to wait for
	for _, tag := range tags {
		if tag < a.next {
			last = max(last, tag)
		}
	}
	if last > 0 {
		_ = a.channel.Ack(last, true)
	}
	for _, tag := range tags {
		if tag >= a.next {
			_ = a.channel.Ack(tag, false)
		}
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
		a.ack(all)
	}
}
