package inbox

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/testenv"
)

// Whatever order deliveries are settled in, each is acknowledged, none before it is settled,
// and the broker takes every acknowledgement: it closes the channel over one of a delivery
// that has been acknowledged.
func TestAcknowledgementsAreThoseOfWhatIsSettled(t *testing.T) {
	t.Parallel()
	conn, err := amqp.Dial(testenv.AMQPURL(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for range 5 {
		ackAtRandom(t, conn)
	}
}

func ackAtRandom(t *testing.T, conn *amqp.Connection) {
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	q, err := ch.QueueDeclare(testenv.Name(t), false, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	const n, kept = 500, 7 // not settled
	for range n {
		if err := ch.PublishWithContext(testenv.Context(t), "", q.Name, false, false, amqp.Publishing{}); err != nil {
			t.Fatal(err)
		}
	}
	deliveries, err := ch.Consume(q.Name, "", false, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, stop, done := newAcks(ch, 100), make(chan struct{}), make(chan struct{})
	go func() { a.run(stop); close(done) }()
	var tags []uint64
	for range n {
		tags = append(tags, (<-deliveries).DeliveryTag)
	}
	rand.Shuffle(n, func(i, j int) { // by some places, as workers do
		if max(i, j)-min(i, j) < 20 {
			tags[i], tags[j] = tags[j], tags[i]
		}
	})
	for some := range slices.Chunk(tags[:n-kept], 1+rand.IntN(30)) {
		a.settled(some)
		time.Sleep(rand.N(5 * time.Millisecond))
	}
	close(stop)
	<-done
	if err := ch.Close(); err != nil { // after the broker has seen all
		t.Fatalf("the broker refused an acknowledgement: %v", err)
	}
	if ch, err = conn.Channel(); err != nil {
		t.Fatal(err)
	}
	defer ch.QueueDelete(q.Name, false, false, false)
	testenv.Eventually(t, 10*time.Second, "what was not settled comes again", func() bool {
		left, err := ch.QueueDeclarePassive(q.Name, false, false, false, false, nil)
		if err != nil {
			t.Fatal(err)
		}
		return left.Messages == kept
	})
}
