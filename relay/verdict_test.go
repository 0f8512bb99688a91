package relay

import (
	"log/slog"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/testenv"
)

// A broker that closes a channel on which one message was in flight says why. Only a
// verdict on the message makes it dead.
func TestOnlyAVerdictOfTheBrokerOnAMessageMakesItDead(t *testing.T) {
	t.Parallel()
	pub, err := RabbitMQ(testenv.AMQPURL(t), RabbitMQConfig{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(testenv.Schema(t).Pool, pub, Config{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx := testenv.Context(t)
	conn, err := r.pub.connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, s := r.newSession(ctx, ctx, conn)
	defer s.end()
	for id, c := range []struct {
		code   int
		reason string
	}{
		{amqp.PreconditionFailed, "dead"}, {amqp.ContentTooLarge, "dead"},
		{amqp.NotFound, "retry"}, {amqp.InternalError, "retry"}, {amqp.ResourceError, "retry"},
	} {
		ch, err := s.newChannel(1, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := ch.ch.Close(); err != nil {
			t.Fatal(err)
		}
		<-ch.closed
		r.hand.admit([]*message{newMessage(int64(id)+1, "", "q")})
		ch.undecided, ch.closeErr = r.hand.take(1), &amqp.Error{Code: c.code, Reason: "closed"}
		ch.decide()
		_, refused := r.hand.toSettle(1)
		if len(refused) != 1 || refused[0].reason != c.reason {
			t.Errorf("%d: %+v", c.code, refused)
		}
	}
}
